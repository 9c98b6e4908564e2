package storage

// Damage is a part of an image disk that is not what it was made as, and that
// somebody's guest may have read.
type Damage struct {
	// Layer is the digest of what the layer unpacks to, as "sha256:…"; empty:
	// the metadata of the image.
	Layer string
	// Mended says that those who come get it whole: the layer was fetched
	// again, the metadata made again. Else the image counts as not here until
	// it is pulled with credentials.
	Mended bool
	// Holds are those who have the damaged file open, and keep it.
	Holds []Hold
}

// A Hold is a user of an image disk, and a name of the image, or its ID if it
// has none any more.
type Hold struct{ User, Image string }

// A DamageTeller is an Images that looks for damage and tells of it.
type DamageTeller interface {
	// Damages has fn called for all damage of disks that somebody has, once
	// what becomes of it is known, also for what was found before. fn must not
	// wait for anything. It is to be called once at most.
	Damages(fn func(Damage))
	// Recheck soon reads all that the disks of user consist of: its guest
	// could not. It returns at once.
	Recheck(user string)
}
