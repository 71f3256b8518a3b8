"""Stage 8, what a person looks at: one HTML page with each query beside the samples that helped and harmed it most."""

from finf_fast.report.page import html_report
from finf_fast.report.ranking import Ranking, spread

__all__ = ["Ranking", "html_report", "spread"]
