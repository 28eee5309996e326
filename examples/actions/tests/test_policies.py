"""Both policies keep the promises that branchtree relies on, and children of a split follow the transition's law."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from branchtree_actions.samples import TASKS, Trajectories

from branchtree.core.gaussian import DanceKernel
