"""The ASGI application, built from engine, tokenizer, metrics and settings."""

from fastapi import FastAPI

from policies.serving.store import PolicyStore, ServedModel
from server.api.errors import add_error_handlers
from server.api.middleware.auth import ApiKeys
from server.api.middleware.body_limit import BodyLimit
from server.api.middleware.head import HeadAsGet
from server.api.middleware.paths import PlainPaths
from server.api.middleware.request_id import RequestId
from server.api.model_names import ModelNames
from server.api.owner import Owners
from server.api.routes import chat, completions, models, operations, samplers, tokens
from server.api.routes import policies as policy_routes
from server.api.sampler_choice import default_sampler
from server.api.schemas.openapi import complete_openapi
from server.api.serving import Serving
from server.api.text_threads import TextThreads
from server.engine import Engine, Limits, Quota
from server.models.text.codec import TextCodec
from server.runtime.metrics import Metrics
from server.runtime.version import VERSION
from server.settings import Settings


def limits_of(settings: Settings) -> Limits:
    """Engine limits taken from the settings."""
    each = settings.key_limit
    quota = Quota() if each is None else Quota(each.rows, each.queued, each.tokens_per_minute)
    return Limits(settings.max_batch, settings.max_queue, settings.max_batch_tokens, settings.max_work, quota)


def create_app(
    engine: Engine, text: TextCodec, metrics: Metrics, settings: Settings, policies: PolicyStore | None = None
) -> FastAPI:
    """Build the HTTP application.

    The caller starts and stops the engine. The model is served under the name that `metrics` carries.

    Raises RequestError for `sampler` or `sampler_params` if the default sampler of the settings does not exist or does
    not fit the model.
    """
    info = engine.info
    policies = policies or PolicyStore(ServedModel(info.architecture, info.vocab_size))
    model_names = ModelNames(metrics.model_name, default_sampler(settings, info), policies, info.pattern)
    metrics.policies(len(policies.list()))
    serving = Serving(engine, text, metrics, settings, model_names, TextThreads(engine, metrics), Owners(settings))
    app = FastAPI(
        title="Unmask",
        summary="An OpenAI-style inference server for diffusion language models",
        version=VERSION,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
    )
    add_error_handlers(app)
    completions.add_routes(app, serving)
    chat.add_routes(app, serving)
    models.add_routes(app, serving)
    samplers.add_routes(app, serving)
    policy_routes.add_routes(app, serving)
    tokens.add_routes(app, serving)
    operations.add_routes(app, serving)
    # The middleware added last sees a request first.
    app.add_middleware(PlainPaths)
    app.add_middleware(HeadAsGet)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, owner_of=serving.owners.of)
    open_paths: frozenset[str] | None = None
    if keys := [key.get_secret_value() for key in settings.api_key]:
        if settings.admin_key is not None:
            keys.append(settings.admin_key.get_secret_value())
        open_paths = operations.OPEN | ({operations.METRICS} if settings.metrics_open else set())
        app.add_middleware(ApiKeys, keys=keys, open_paths=open_paths)
    app.add_middleware(RequestId)
    complete_openapi(app, open_paths)
    return app
