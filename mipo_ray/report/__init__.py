"""The run's page: report.html."""
