"""Where Hydra looks for sweepers; it knows one by the module of its class."""

from launch import search


class Search(search.Search):
    """Searches where there is a `hparams`, else runs every combination."""
