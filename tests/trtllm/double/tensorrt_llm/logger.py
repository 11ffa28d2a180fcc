"""``tensorrt_llm.logger.logger``: keeps the lines, so that tests can look for warnings."""


class _Logger:
    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def info(self, *text: object) -> None:
        self.lines.append(("info", " ".join(map(str, text))))

    def warning(self, *text: object) -> None:
        self.lines.append(("warning", " ".join(map(str, text))))

    def error(self, *text: object) -> None:
        self.lines.append(("error", " ".join(map(str, text))))

    def debug(self, *text: object) -> None:
        pass


logger = _Logger()
