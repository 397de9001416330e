from .comparison import Comparison, compare
from .html_report import write_report
from .tables import comparison_tables, diagnosis_tables

__all__ = ["Comparison", "compare", "comparison_tables", "diagnosis_tables", "write_report"]
