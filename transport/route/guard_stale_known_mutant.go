//go:build mutant_stale_known

package route

const knownAreTaken = false
