"""Which class reads which `source.name`."""

from __future__ import annotations

from typing import Any

from data_prep.config import PrepConfig
from data_prep.sources.amber import Amber
from data_prep.sources.base import Source
from data_prep.sources.coco import Coco
from data_prep.sources.conversations import Conversations
from data_prep.sources.folder import Folder
from data_prep.sources.gqa import Gqa
from data_prep.sources.ocrvqa import OcrVqa
from data_prep.sources.pope import Pope
from data_prep.sources.rlaifv import Rlaifv
from data_prep.sources.shards import Shards
from data_prep.sources.textvqa import TextVqa
from data_prep.sources.vqa import Vqa

SOURCES: dict[str, Any] = {
    "rlaifv": Rlaifv,
    "pope": Pope,
    "amber": Amber,
    "coco": Coco,
    "vqa": Vqa,
    "gqa": Gqa,
    "textvqa": TextVqa,
    "ocrvqa": OcrVqa,
    "conversations": Conversations,
    "folder": Folder,
    "shards": Shards,
}


def open_source(config: PrepConfig) -> Source:
    """The source that a configuration names, under the configuration's own name of the data set."""
    source = SOURCES[config.source.name](config.source)
    source.dataset = config.dataset
    return source
