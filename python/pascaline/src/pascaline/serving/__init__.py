"""Supervision of one engine: process, health, agent, systemd notification."""
