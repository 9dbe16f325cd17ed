"""What may happen to a setting on resume. Each leaf of the configuration carries one of these marks."""

import enum
from typing import Annotated, TypeVar

from pydantic import Field


class OnResume(enum.Enum):
    """What a changed value means when a run is resumed."""

    FREE = "free"
    ANNOUNCED = "announced"
    FIXED = "fixed"


T = TypeVar("T")
Free = Annotated[T, OnResume.FREE]
Announced = Annotated[T, OnResume.ANNOUNCED]
Fixed = Annotated[T, OnResume.FIXED]
Positive = Annotated[int, Field(ge=1)]
