"""The one exception of the double that TensorRT does not have."""


class ContractError(AssertionError):
    """Something TensorRT, TensorRT-LLM or our plugin would refuse, or would silently do wrong."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise ContractError(message)
