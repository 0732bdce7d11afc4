"""Monitoring as typed Python: dashboards, alert rules and the page of metrics, generated and committed."""
