//go:build mutant_wall_age

package appliance

const agesByWallClock = true
