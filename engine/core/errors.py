"""The engine's errors: one tree, each message says what to do."""


class EngineError(Exception):
    """Whatever the engine raises on purpose."""


class ModelError(EngineError):
    """A model folder that cannot be served: missing, of another family, or with weights that do not fit it."""


class CapacityError(EngineError):
    """A sequence that can never fit the KV pool or the model's context."""


class GroupLost(EngineError):
    """A rank of the tensor-parallel group is dead or silent: the group cannot go on, and this process is to end."""


class StepLost(EngineError, RuntimeError):
    """Another rank failed in this step; the group stands, and its next step may succeed."""
