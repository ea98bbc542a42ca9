"""What a run shows: sampled rollouts with their images, and `report.html`."""

from jaxrl_vlm.report.page import write_report
from jaxrl_vlm.report.plots import save_curve
from jaxrl_vlm.report.rollouts import RolloutLog, Sample, read_rollouts

__all__ = ["RolloutLog", "Sample", "read_rollouts", "save_curve", "write_report"]
