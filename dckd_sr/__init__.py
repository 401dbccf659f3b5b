"""DCKD (Dynamic Contrastive Knowledge Distillation, AAAI 2025) as an extension of BasicSR.

Importing this package makes BasicSR 1.4.2 importable on current Python, torch and torchvision, and registers our
archs, losses, datasets and models in BasicSR's registries.
"""

from dckd_sr import commands

commands.check_python()
commands.answer_help()

try:
    from dckd_sr import compat

    compat.apply()

    from dckd_sr import archs, data, losses, models  # noqa: F401  (registration is the purpose)
except (ImportError, OSError) as error:  # the latter where a library of torch's does not load
    commands.explain(error)
    raise

__version__ = '0.1.0'
