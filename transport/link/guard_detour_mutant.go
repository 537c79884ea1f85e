//go:build mutant_detour

package link

const goesAround = false
