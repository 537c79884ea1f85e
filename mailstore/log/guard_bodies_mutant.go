//go:build mutant_bodies

package log

const bodiesCount = false
