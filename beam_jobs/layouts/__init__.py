"""The raw layouts: one file a layout. `LAYOUTS` lists them; for each split, the first that recognises the raw folder reads it.

A new layout is one file here, with a class that implements `layout.Layout`, and one entry of `LAYOUTS`.
"""

from beam_jobs.layouts.archives import Archives
from beam_jobs.layouts.folders import Folders
from beam_jobs.layouts.layout import Layout

LAYOUTS: tuple[Layout, ...] = (Archives(), Folders())
