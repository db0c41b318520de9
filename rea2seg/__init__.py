__version__ = "0.1.0"
__all__ = ["Rea2Seg", "Segmentation", "Settings", "show"]

_homes = {"Rea2Seg": "pipeline", "Segmentation": "pipeline", "Settings": "settings", "show": "pictures"}


def __getattr__(name):
    "The public names, imported when they are first used: `import rea2seg` alone stays light."
    if name in _homes:
        from importlib import import_module
        return getattr(import_module(f"rea2seg.{_homes[name]}"), name)
    raise AttributeError(f"module 'rea2seg' has no attribute {name!r}")


def __dir__(): return sorted([*globals(), *__all__])
