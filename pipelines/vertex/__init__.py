"""Vertex AI: its machines, container images and jobs, and the checks before a job is sent."""
