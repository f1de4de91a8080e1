"""The guarded model: a causal language model that scores its own request and response.

Nothing here knows HTTP, data sets or training. Import from the submodules, as in
`from model.policy import Policy`; see `docs/architecture.md` for the order to read them in.

Shapes are written at the line's end in one alphabet:
B batch, T time (tokens of this pass), S keys (tokens in the cache), V vocabulary, D width, H heads.
"""

__version__ = "0.1.0"
