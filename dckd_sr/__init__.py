"""DCKD (Dynamic Contrastive Knowledge Distillation, AAAI 2025) as an extension of BasicSR.

Importing this package makes BasicSR 1.4.2 importable on current Python, torch and torchvision, and registers our
archs, losses, datasets and models in BasicSR's registries.
"""

from dckd_sr import commands

commands.answer_help()

from dckd_sr import compat  # noqa: E402

compat.apply()

from dckd_sr import archs, data, losses, models  # noqa: E402, F401  (registration is the purpose)

__version__ = '0.1.0'
