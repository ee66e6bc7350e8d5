# SPDX-License-Identifier: Apache-2.0
"""Training: one loop, and what it trains."""
