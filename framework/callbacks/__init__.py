"""Callbacks: what happens around a training step."""

from orthotrain.callbacks.merge_rotations import MergeRotations, merge_rotations
from orthotrain.callbacks.orthogonality_monitor import OrthogonalityMonitor
from orthotrain.callbacks.project_generators import ProjectGenerators
from orthotrain.callbacks.run_report import RunReport
from orthotrain.callbacks.throughput import Throughput

__all__ = ["MergeRotations", "OrthogonalityMonitor", "ProjectGenerators", "RunReport", "Throughput", "merge_rotations"]
