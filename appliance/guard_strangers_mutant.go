//go:build mutant_strangers

package appliance

const asksAboutStrangers = false
