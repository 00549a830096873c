"""Durable work on JetStream: queues of jobs, their claims, their dead letters, and large messages."""
