"""Pictures and the HTML reports."""

from bkdfast.report.deltas import delta_summary, write_delta_report
from bkdfast.report.html import write_report
from bkdfast.report.text import summary

__all__ = ["delta_summary", "summary", "write_delta_report", "write_report"]
