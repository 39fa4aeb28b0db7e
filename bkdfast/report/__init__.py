"""Pictures and the HTML report."""

from bkdfast.report.html import write_report
from bkdfast.report.text import summary

__all__ = ["summary", "write_report"]
