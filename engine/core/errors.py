"""The engine's errors: one tree, each message says what to do."""


class EngineError(Exception):
    """Whatever the engine raises on purpose."""


class ModelError(EngineError):
    """A model folder that cannot be served: missing, of another family, or with weights that do not fit it."""


class CapacityError(EngineError):
    """A sequence that can never fit the KV pool or the model's context."""
