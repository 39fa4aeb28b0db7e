"""The ops: one file per op, with its meaning, schema, fake, reference and public function."""
