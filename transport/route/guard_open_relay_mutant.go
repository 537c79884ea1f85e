//go:build mutant_open_relay

package route

const relaysForOwnOnly = false
