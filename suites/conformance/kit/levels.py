"""Why a clause is a SHOULD: the reasons that several checks share.

A MUST is what upstream documents, or what corrupts, loses, hangs or lies where it goes wrong. A
check without `@pytest.mark.should(reason)` is one.
"""

COUNT = "more collectives cost time, and no value"
BYTES = "bytes that a rank moves or copies beyond its need cost time, and no value"
MEMORY = "memory beyond the need costs room, and no value as long as it lasts"
WORDS = "the words of a message; that it raises, another check demands as a MUST"
IDENTITY = "no caller is promised that the object stays, if what it holds is right"
STRIDES = "values are the same in any strides; another memory format costs time"
EXOTIC = "a type of containers that few state dicts hold"
OPAQUE = (
    "beyond what upstream does right with sparse, quantized and wrapper tensors: "
    "these may also be refused by name on every rank"
)
