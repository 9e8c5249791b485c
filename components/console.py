"""Pages of Google Cloud's console that this project links to."""

_CONSOLE = "https://console.cloud.google.com"


def pipeline_job_page(project: str, region: str, job: str) -> str:
    """Returns the URL of a pipeline job on Vertex AI."""
    return f"{_CONSOLE}/vertex-ai/locations/{region}/pipelines/runs/{job}?project={project}"


def logs_page(project: str, query: str) -> str:
    """Returns the URL of the log entries that match `query`, which is percent-encoded."""
    return f"{_CONSOLE}/logs/query;query={query}?project={project}"
