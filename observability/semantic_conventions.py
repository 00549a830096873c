"""The attribute and metric names that our spans carry, in one place and at one version.

In: nothing. Out: constants that every package passes to `span(..., attributes={...})`.
Invariants: a name of OpenTelemetry's own is spelt exactly as its conventions spell it (a test compares them
with the `opentelemetry.semconv` package); ours begin with `nixl.` and end in their unit where they have one.
Leaves out: who sets which attribute on which span (README.md has the tree).
Source: OpenTelemetry semantic conventions 1.44.0. `messaging.*` and `gen_ai.*` are in Development there, so
they may be renamed; `gen_ai.*` moved to the semantic-conventions-genai repository after 1.41 with these names
unchanged. NATS has no registered `messaging.system` value; `nats` is what its instrumentations use.
"""

from typing import Final

SEMANTIC_CONVENTIONS_VERSION: Final = "1.44.0"
SCHEMA_URL: Final = f"https://opentelemetry.io/schemas/{SEMANTIC_CONVENTIONS_VERSION}"

# Messaging (Development)
MESSAGING_SYSTEM: Final = "messaging.system"
MESSAGING_SYSTEM_NATS: Final = "nats"
MESSAGING_OPERATION_NAME: Final = "messaging.operation.name"
MESSAGING_OPERATION_TYPE: Final = "messaging.operation.type"
MESSAGING_OPERATION_TYPE_SEND: Final = "send"
MESSAGING_OPERATION_TYPE_RECEIVE: Final = "receive"
MESSAGING_OPERATION_TYPE_PROCESS: Final = "process"
MESSAGING_OPERATION_TYPE_SETTLE: Final = "settle"
MESSAGING_DESTINATION_NAME: Final = "messaging.destination.name"
MESSAGING_DESTINATION_TEMPLATE: Final = "messaging.destination.template"
MESSAGING_DESTINATION_TEMPORARY: Final = "messaging.destination.temporary"
MESSAGING_CONSUMER_GROUP_NAME: Final = "messaging.consumer.group.name"
MESSAGING_CLIENT_ID: Final = "messaging.client.id"
MESSAGING_MESSAGE_ID: Final = "messaging.message.id"
MESSAGING_MESSAGE_CONVERSATION_ID: Final = "messaging.message.conversation_id"
MESSAGING_MESSAGE_BODY_SIZE: Final = "messaging.message.body.size"
MESSAGING_BATCH_MESSAGE_COUNT: Final = "messaging.batch.message_count"
NIXL_JOB_DELIVERY_COUNT: Final = "nixl.job.delivery_count"
"""Our own: which delivery of a durable message this is, counted from 1."""
NIXL_JOB_STREAM_SEQUENCE: Final = "nixl.job.stream_sequence"
"""Our own: its number in the JetStream stream."""

# Any client or server (stable)
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"
ERROR_TYPE: Final = "error.type"
ERROR_TYPE_CANCELLED: Final = "cancelled"
ERROR_TYPE_OTHER: Final = "_OTHER"

# Generative AI (Development)
GEN_AI_OPERATION_NAME: Final = "gen_ai.operation.name"
GEN_AI_OPERATION_NAME_CHAT: Final = "chat"
GEN_AI_PROVIDER_NAME: Final = "gen_ai.provider.name"
GEN_AI_OUTPUT_TYPE: Final = "gen_ai.output.type"
GEN_AI_REQUEST_MODEL: Final = "gen_ai.request.model"
GEN_AI_REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
GEN_AI_REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
GEN_AI_REQUEST_TOP_P: Final = "gen_ai.request.top_p"
GEN_AI_REQUEST_STREAM: Final = "gen_ai.request.stream"
GEN_AI_RESPONSE_ID: Final = "gen_ai.response.id"
GEN_AI_RESPONSE_MODEL: Final = "gen_ai.response.model"
GEN_AI_RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
# Seconds. The span attribute; the name with "token" below is the conventions' metric.
GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
GEN_AI_USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
GEN_AI_USAGE_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
METRIC_GEN_AI_SERVER_TIME_TO_FIRST_TOKEN: Final = "gen_ai.server.time_to_first_token"  # noqa: S105
METRIC_GEN_AI_SERVER_TIME_PER_OUTPUT_TOKEN: Final = "gen_ai.server.time_per_output_token"  # noqa: S105
METRIC_GEN_AI_SERVER_REQUEST_DURATION: Final = "gen_ai.server.request.duration"

# HTTP, on the frontend's SERVER span (stable)
HTTP_REQUEST_METHOD: Final = "http.request.method"
HTTP_RESPONSE_STATUS_CODE: Final = "http.response.status_code"
HTTP_ROUTE: Final = "http.route"
URL_PATH: Final = "url.path"
URL_SCHEME: Final = "url.scheme"

# The data plane: no convention exists, so these are ours
NIXL_OPERATION: Final = "nixl.operation"
NIXL_OPERATION_READ: Final = "READ"
NIXL_OPERATION_WRITE: Final = "WRITE"
NIXL_OPERATION_ID: Final = "nixl.operation.id"
NIXL_BYTES: Final = "nixl.bytes"
NIXL_BANDWIDTH_BYTES_PER_S: Final = "nixl.bandwidth_bytes_per_s"
NIXL_DESCRIPTORS_COUNT: Final = "nixl.descriptors.count"
NIXL_BACKEND: Final = "nixl.backend"
NIXL_AGENT_LOCAL: Final = "nixl.agent.local"
NIXL_AGENT_REMOTE: Final = "nixl.agent.remote"
NIXL_WAIT_POST_TO_DONE_MS: Final = "nixl.wait.post_to_done_ms"
NIXL_STATUS: Final = "nixl.status"
NIXL_OPERATION_GRANTED_BYTES: Final = "nixl.operation.granted_bytes"
NIXL_OPERATION_ACKNOWLEDGED_BYTES: Final = "nixl.operation.acknowledged_bytes"
NIXL_CHUNKS_COUNT: Final = "nixl.chunks.count"
NIXL_POST_US: Final = "nixl.post_us"
NIXL_WAIT_QUEUE_MS: Final = "nixl.wait.queue_ms"
