//go:build mutant_read

package relay

const untilRead = false
