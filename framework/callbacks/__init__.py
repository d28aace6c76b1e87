"""Callbacks: what happens around a training step."""

from orthotrain.callbacks.adapter_checkpoint import AdapterCheckpoint, restore_frozen
from orthotrain.callbacks.batch_seeds import BatchSeeds
from orthotrain.callbacks.causality_check import CausalityCheck
from orthotrain.callbacks.final_checkpoint import FinalCheckpoint
from orthotrain.callbacks.finite_guard import FiniteGuard
from orthotrain.callbacks.limit_generators import LimitGenerators
from orthotrain.callbacks.merge_rotations import MergeRotations
from orthotrain.callbacks.movement_monitor import MovementMonitor
from orthotrain.callbacks.orthogonality_monitor import OrthogonalityMonitor
from orthotrain.callbacks.packing_check import PackingCheck
from orthotrain.callbacks.project_generators import ProjectGenerators
from orthotrain.callbacks.run_progress import RunProgress
from orthotrain.callbacks.run_report import RunReport
from orthotrain.callbacks.spectrum_monitor import SpectrumMonitor
from orthotrain.callbacks.throughput import Throughput

__all__ = [
    "AdapterCheckpoint",
    "BatchSeeds",
    "CausalityCheck",
    "FinalCheckpoint",
    "FiniteGuard",
    "LimitGenerators",
    "MergeRotations",
    "MovementMonitor",
    "OrthogonalityMonitor",
    "PackingCheck",
    "ProjectGenerators",
    "RunProgress",
    "RunReport",
    "SpectrumMonitor",
    "Throughput",
    "restore_frozen",
]
