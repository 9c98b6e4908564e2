package storage

// An Orphan is something that bears the cluster's mark in a back end and is no
// volume or snapshot that anybody has: what an interrupted call left, or a
// volume whose claim and PersistentVolume are gone.
type Orphan struct {
	// ID is a disk's, or a disk's and its snapshot's with a dot between.
	ID string
	// Name is the volume's, that of the claim that it was made for.
	Name string
	// Why is a sentence.
	Why string
	// Disposable: it is proven that nobody has ever been given it, or that its
	// deletion was asked for. Anything else may hold data and is only told of.
	Disposable bool
}
