"""Every ``*_model.py`` here is imported, so that its classes register in BasicSR."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    if _module.name.endswith('_model'):
        importlib.import_module(f'{__name__}.{_module.name}')
