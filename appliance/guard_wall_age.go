//go:build !mutant_wall_age

package appliance

// agesByWallClock says that what waits grows old by a clock that people set. It
// does not; the tag mutant_wall_age makes it so, and the tests must notice.
const agesByWallClock = false
