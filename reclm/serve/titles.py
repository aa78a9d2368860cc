"""Titles for a model that came without them: MovieLens' are not redistributed, but many have movies.dat."""

from pathlib import Path

import numpy as np

from reclm.data.features import item_texts
from reclm.data.own import read_side_table
from reclm.data.readers import read_table
from reclm.errors import UserError
from reclm.serve.catalogue import Catalogue


def with_titles(catalogue: Catalogue, table: Path) -> Catalogue:
    """The same items with the titles and genres of a table, found by id: MovieLens' movies.dat, or a file
    with the columns item, title and perhaps genres. An item that is not in it keeps its id as its title.
    Raises UserError for a table that cannot be read, or that has no title for any of the items."""
    if not table.is_file():
        raise UserError(f"--titles={table} does not exist: name a movies.dat, or a file with item and title")
    if table.name == "movies.dat":
        read = read_table(table, "::", "item title genres", encoding="latin-1")
    else:
        read = read_side_table(table, "item")
    texts = item_texts(read.assign(item=read["item"].astype(str)), np.array(catalogue.ids, object))
    titles = texts.get("titles", np.zeros(0, str))
    if not titles.any():
        raise UserError(f"--titles={table} has no title of any item of this model: it belongs to other data")
    titles = [title or item for title, item in zip(titles.tolist(), catalogue.ids, strict=True)]
    genres = texts.get("genre_names", np.array(catalogue.genres)).tolist()
    return Catalogue(catalogue.ids, titles, genres, catalogue.counts)
