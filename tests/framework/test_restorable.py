"""A checkpoint with something else in the place of what a run restores ends in one line, in a real Trainer."""

import copy
import random
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn

from orthotrain.callbacks import OrthogonalityMonitor, SpectrumMonitor
from orthotrain.data.sampling import ResumableLoader
from orthotrain.errors import ConfigurationError, TrainingDiverged
from orthotrain.modules import Optimization, PoetLayers, PoetModule
from orthotrain.schedules import CosineWithWarmup
