"""Small tokenizers with the chat templates of well-known models, in as few lines as show their traps."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATES = {
    # Headers, a newline pair before each message, no newline after.
    "llama3": """{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|header|>

{{ m['content'] | trim }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|header|>

{% endif %}""",
    # A newline behind the end token, and no begin-of-text token.
    "chatml": """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    # Another name for the assistant, and messages without the spaces around them.
    "gemma": """{{ bos_token }}{% for m in messages %}<|turn|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}
{{ m['content'] | trim }}<|turn_end|>
{% endfor %}{% if add_generation_prompt %}<|turn|>model
{% endif %}""",
    # Nothing marks the model's turn, and the end token follows the answer at once.
    "mistral": """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]\
{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}""",
    # The prompt opens what past answers do not have.
    "thinking": """{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\
{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant|><think>
{% endif %}""",
    # Nothing closes an answer.
    "bare": """{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}{% if not loop.last %} {% endif %}\
{% endfor %}{% if add_generation_prompt %} assistant : {% endif %}""",
}
CLOSING = {
    "llama3": "<|eot|>",
    "chatml": "<|im_end|>\n",
    "gemma": "<|turn_end|>\n",
    "mistral": "</s>",
    "thinking": "</s>",
    "bare": "",
}
SPECIAL = (
    "<pad>", "<s>", "</s>", "<|start|>", "<|header|>", "<|eot|>", "<|im_start|>", "<|im_end|>", "<|turn|>",
    "<|turn_end|>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<think>",
)  # fmt: skip


def tokenizer(template: str | None, size: int = 67) -> PreTrainedTokenizerFast:
    """A tokenizer of words, each of which stands for one of `size` tokens: w0, w1, ... and what templates need."""
    words = [*SPECIAL, "<unk>", "\n", "\n\n", " ", "user", "model", "assistant", ":"]
    words += [f"w{i}" for i in range(size - len(words))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+| |[^ \n]+"), "isolated")
    inner.decoder = decoders.Fuse()
    found = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[3:]),
    )
    found.chat_template = None if template is None else TEMPLATES[template]
    return found
