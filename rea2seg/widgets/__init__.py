"Widgets that look inside: attention, seed points, candidates, scores."
__all__ = ["AttentionExplorer", "CandidateGallery", "KcoreExplorer", "explore", "explore_attention", "explore_candidates", "explore_kcore"]

_homes = {"AttentionExplorer": "attention", "explore": "attention", "explore_attention": "attention", "KcoreExplorer": "kcore", "explore_kcore": "kcore",
          "CandidateGallery": "gallery", "explore_candidates": "gallery"}


def __getattr__(name):
    "Imported when first used: a part of the package needs no widget of the others."
    if name in _homes:
        from importlib import import_module
        return getattr(import_module(f"rea2seg.widgets.{_homes[name]}"), name)
    raise AttributeError(f"module 'rea2seg.widgets' has no attribute {name!r}")


def __dir__(): return sorted([*globals(), *__all__])
