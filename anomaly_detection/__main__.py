"""`python -m anomaly_detection`."""

from anomaly_detection.cli import main

if __name__ == "__main__":
    main()
