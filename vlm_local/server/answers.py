"""POST /answer: a question about a picture, answered by the model that also drives the robots."""

import threading

from flask import Flask, Response, request

from vlm_local.answers import Answerer, build_answer_details, decode_question
from vlm_local.files import encode_json
from vlm_local.server.bodies import read_body
from vlm_local.server.service import Service, take_place

MAX_QUESTIONS = 2  # at once: success detection shall not keep a robot waiting


def add_answer_route(app: Flask, answerer: Answerer) -> None:
    service: Service = app.extensions["vlm_local"]
    places = threading.BoundedSemaphore(MAX_QUESTIONS)

    @app.post("/answer")
    def answer():
        refusal = f"{MAX_QUESTIONS} questions are being answered already; ask again"
        with service.enter(), take_place(places, refusal):
            with service.reading(request.content_length):
                question = decode_question(read_body())
            details = build_answer_details(answerer.answer(question), service.metadata.get("model"))
        return Response(encode_json(details) + "\n", mimetype="application/json")
