"""The report of a run: saved rollouts with their images, and the page `report.html`."""

from jaxrl_vlm.report.page import write_report
from jaxrl_vlm.report.plots import save_curve
from jaxrl_vlm.report.rollouts import RolloutLog, Sample, read_rollouts

__all__ = ["RolloutLog", "Sample", "read_rollouts", "save_curve", "write_report"]
