"""The axis glossary. Shapes in docstrings, einsum strings and result dimensions use these words and no others."""

AXES = {
    "batch": "rows of one forward pass",
    "prompt": "prompt pairs of a task",
    "pos": "token positions, padding included; padding is on the left",
    "query": "positions that attend",
    "key": "positions that are attended to",
    "layer": "transformer blocks, from 0",
    "head": "query heads of a layer",
    "kv_head": "key/value heads of a layer (fewer than `head` under grouped-query attention)",
    "d_model": "width of the residual stream",
    "d_head": "width of a head",
    "d_mlp": "width of the MLP's hidden layer",
    "d_vocab": "tokens of the vocabulary",
    "neuron": "units of the MLP's hidden layer",
    "feature": "coordinates in a basis, units of a sparse autoencoder",
    "role": "named token positions of a task, such as IO, S1, S2, END",
    "target": "positions at which a task asks for an answer",
    "one": "an axis of length one",
    "edge": "connections of a circuit's graph",
    "source": "nodes that write into the residual stream",
    "destination": "nodes that read from the residual stream",
}
