//go:build mutant_flow

package queue

const flowTogether = false
