"""What a user is told when something is wrong: one sentence, with the numbers in it.

Every error that a user can cause is a `FoxEdgeError`; the command line prints it without a traceback
and exits with status 2. Anything else that escapes is a bug: traceback kept, status 1.
"""


class FoxEdgeError(Exception):
    """A mistake that the user can correct; `str(error)` is one sentence for them."""


class CheckpointError(FoxEdgeError):
    """A checkpoint folder that is missing, foreign, damaged or hostile."""


class TokenizerError(FoxEdgeError):
    """Tokenizer files that are missing, damaged or disagree with the model."""


class RecipeError(FoxEdgeError):
    """A quantization that does not exist or cannot hold a tensor."""


class ArtifactError(FoxEdgeError):
    """An exported model that is missing, damaged, or in the way."""


class VerificationError(FoxEdgeError):
    """An export that is not the model it was made from."""


class ContextOverflowError(FoxEdgeError):
    """A text longer than the context that was opened for it."""


class ConversationError(FoxEdgeError):
    """A file that is no conversation, or not one to go on with."""


class MissingPackageError(FoxEdgeError):
    """An optional package that is not installed; names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed; add it with: pip install 'fox-edge[{extra}]' "
            f"(in a clone: pip install -e '.[{extra}]')"
        )


class NotEnoughMemoryError(FoxEdgeError):
    """A session that would not fit in the memory that is left."""
