"""The checkpoint format: how it is written, checked and read. Needs neither DeepSpeed nor a process group.

A checkpoint is a folder ``step_00000100``::

    index.json                              what is where: tensors, their stretches, sizes and checksums
    model-00001-of-00004.safetensors        weights, one file a rank
    optimizer-00001-of-00004.safetensors    moments, one file a rank
    rank-00001-of-00004.json                position in the data and random generators of a rank

Tensors have their logical names and shapes (:mod:`moe_scale.moe.placement`), whatever the number of ranks, the ZeRO
stage and the backend that wrote them. A tensor that several ranks hold is stored as stretches of its flattened form,
``name[first:last]``; one that a rank holds alone is stored whole, under its plain name.
"""
