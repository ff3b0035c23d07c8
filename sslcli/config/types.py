"""Numbers with names: bounds that read as words."""

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class Operational:
    """Marks a field that changes how a run is carried out but not what it computes.

    Such fields may differ between a run and its resumption; all others may not.
    """
