"""Callbacks: what happens around a training step."""

from orthotrain.callbacks.adapter_checkpoint import AdapterCheckpoint, restore_frozen
from orthotrain.callbacks.merge_rotations import MergeRotations, merge_rotations
from orthotrain.callbacks.orthogonality_monitor import OrthogonalityMonitor
from orthotrain.callbacks.project_generators import ProjectGenerators
from orthotrain.callbacks.run_report import RunReport
from orthotrain.callbacks.throughput import Throughput

__all__ = [
    "AdapterCheckpoint",
    "MergeRotations",
    "OrthogonalityMonitor",
    "ProjectGenerators",
    "RunReport",
    "Throughput",
    "merge_rotations",
    "restore_frozen",
]
