"""The one class that TorchServe loads; the only file that knows TorchServe's context object.

It is copied to the root of each archive as the handler. TorchServe reports any import that fails here as "No module
named 'ts.torch_handler…'", so everything of ours is imported inside `initialize`, where its own error is shown.
"""

import contextlib
import gc
import json
import logging
import os
import sys
import time
from typing import Any

LOG_LEVEL_VARIABLE = "DETSERVE_WORKER_LOG"
"""What the worker logs: TorchServe's worker writes two lines a request at INFO, and its frontend parses each."""


class DetectionHandler:
    """Loads the archive once, then answers batches.

    It is no BaseHandler: importing that would switch TF32 on and probe every runtime.
    """

    def __init__(self) -> None:
        self._detector: Any = None
        self._books: Any = None

    def initialize(self, context: Any) -> None:
        """Load the archive and check its golden image; a worker that must not serve says why and ends."""
        if os.environ.get(LOG_LEVEL_VARIABLE):
            logging.getLogger().setLevel(os.environ[LOG_LEVEL_VARIABLE])
        try:
            self._load(context)
        except BaseException as error:
            reason = {"type": getattr(error, "type", type(error).__name__), "message": str(error)}
            with contextlib.suppress(Exception):  # the reason counts, not the count of it
                self._open_books(context).started(reason["type"])
            print(f"DETSERVE_STARTUP_ERROR {json.dumps(reason)}", flush=True)  # noqa: T201 - TorchServe logs stdout
            raise

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        """Answer one batch: as many JSON texts as requests, in their order."""
        books = self._books.batch(len(data))
        try:
            return self._answer(data, context, books)
        finally:
            books.close()

    def _answer(self, data: list[dict[str, Any]], context: Any, books: Any) -> list[str]:
        begun = time.perf_counter()
        from dethandlers.detector import Request
        from dethandlers.errors import RequestError
        from dethandlers.open_inference import InferRequest
        from dethandlers.options import parse_options
        from dethandlers.payload import OPTIONS_HEADER, split_row
        from dethandlers.request_log import ID_HEADER
        from dethandlers.responses import json_text, to_json_text, too_long

        detector = self._detector
        spec = detector.spec
        slots: list[RequestError | Request | None] = []
        infers: dict[int, InferRequest] = {}  # those of the Open Inference Protocol
        for index, row in enumerate(data):
            if context.get_request_header(index, "describe") == "True":
                slots.append(None)
                continue
            headers = {name.lower(): value for name, value in context.get_all_request_header(index).items()}
            # TorchServe keeps the headers of a form's fields under the fields' names: those are no text.
            header = headers.get(OPTIONS_HEADER.lower(), "")
            header = header if isinstance(header, str) else ""
            context.set_response_header(
                index, ID_HEADER, books.begin(index, row, headers, context.get_request_id(index))
            )
            infer = InferRequest.recognise(row, headers, context.get_request_id(index) or "")
            try:
                if infer is None:
                    image, values = split_row(row, header)
                else:
                    infers[index] = infer
                    image, values = infer.split(row, header)
                options = parse_options(values, spec.serving, spec.categories, detector.family.capabilities)
                slots.append(Request(image, options))
            except RequestError as error:
                slots.append(error)
            except RecursionError:
                slots.append(RequestError("got JSON nested too deeply, expected flat values."))
        accepted = [slot for slot in slots if isinstance(slot, Request)]
        answers = iter(detector.detect(accepted, batch_size=len(data)))
        texts = []
        model = _model_of(context)
        for index, slot in enumerate(slots):
            if slot is None:
                texts.append(json.dumps(detector.describe()))
                continue
            result = slot if isinstance(slot, RequestError) else next(answers)
            context.set_response_content_type(index, "application/json")
            if isinstance(slot, Request) and not isinstance(result, RequestError):
                written_since = time.perf_counter()
                text = to_json_text(result, slot.options, spec.categories, begun)
                if index in infers:
                    text = infers[index].answer(text, result.detections, model)
                refusal = too_long(text, len(result.detections), spec.serving.max_response_bytes)
                if refusal is None:
                    books.answer(index, result, body_bytes=len(slot.image), written_since=written_since)
                else:
                    result = refusal
            if isinstance(result, RequestError):
                context.set_response_status(code=result.code, phrase=result.type, idx=index)
                result.request_id = books.request_id(index)
                books.refuse(index, result, body_bytes=len(slot.image) if isinstance(slot, Request) else None)
                text = json_text(result.to_json()) if index not in infers else infers[index].error(result, model)
            texts.append(text)
        return texts

    def _load(self, context: Any) -> None:
        from pathlib import Path

        from dethandlers.artefact import load_artefact
        from dethandlers.detector import Detector
        from dethandlers.errors import ArtefactError
        from dethandlers.runtimes import choose_device

        properties = context.system_properties
        artefact = load_artefact(Path(properties["model_dir"]))
        books = self._open_books(context)
        serving = artefact.spec.serving
        self._detector = Detector(artefact, choose_device(serving.device, properties.get("gpu_id")))
        # What is loaded stays: the collector need not look through the framework's objects again and again.
        gc.collect()
        gc.freeze()
        books.device = self._detector.runtime.device
        if serving.golden_check == "off" or artefact.golden is None:
            books.started("ready")
        else:
            drift = self._detector.check_golden()
            if drift and serving.golden_check == "fail":
                raise ArtefactError(
                    f"golden check: {drift}. The served model is not the one that was packed: build the archive again, "
                    "or set serving.golden_check: warn.",
                    type="golden_drift",
                )
            if drift:
                logging.getLogger("detserve").warning("golden check: %s", drift)
            books.started("ready", golden_passed=not drift)
        print(f"DETSERVE_READY {json.dumps(self._detector.describe())}", file=sys.stdout, flush=True)  # noqa: T201

    def _open_books(self, context: Any) -> Any:
        from dethandlers.bookkeeping import Books

        if self._books is None:
            self._books = Books(*_model_of(context))
        return self._books


def _model_of(context: Any) -> tuple[str, str]:
    """Name and version under which the model is served."""
    return str(context.model_name), str((context.manifest.get("model") or {}).get("modelVersion", ""))
